"""offload: send a build to the machine that it works on.

The daemon and its library.  Data flows one way: config -> plan -> route -> instance -> guest -> build -> result.
"""

__version__ = "0.1.0"
