"""The smallest derivations that there are: a static shell builds them, in a tenth of a second where it is done on the spot."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from subprocess import CompletedProcess

from .node import Node

SHELL = "/opt/shell"
"""A directory with what they need.  The busybox file alone would be called by its store name, which is no applet's."""

_GUIX = f"""\
(use-modules (guix store) (guix derivations) (ice-9 match))
(match (cdr (program-arguments))
  ((name script features where)
   (with-store store
     (set-build-options store #:print-build-trace #f #:use-substitutes? #f #:offload? (string=? where "anywhere"))
     (let* ((shell (add-to-store store "shell" #t "sha256" "{SHELL}"))
            (drv (derivation store name (string-append shell "/bin/sh") (list "-c" script)
                             #:sources (list shell)
                             #:env-vars `(("PATH" . ,(string-append shell "/bin"))
                                          ("requiredSystemFeatures" . ,features)))))
       (build-derivations store (list drv))
       (display (derivation->output-path drv))))))
"""


def _prepare(node: Node) -> None:
    if not node.path(f"{SHELL}/bin").exists():
        node.install(f"{SHELL}/bin/busybox", node.path("/usr/bin/busybox").read_bytes(), mode=0o755)
        node.path(f"{SHELL}/bin/sh").symlink_to("busybox")
        node.install("/opt/build.scm", _GUIX)


def guix_build(
    node: Node,
    name: str,
    script: str,
    *,
    features: str = "",
    local: bool = False,
    status: int | None = 0,
    limit_s: float = 300,
) -> CompletedProcess[str]:
    """Have the node's guix-daemon build a derivation of that name; standard output is the path of what came out."""
    _prepare(node)
    argv = ["guix", "repl", "--", "/opt/build.scm", name, script, features, "here" if local else "anywhere"]
    return node.run(*argv, status=status, limit_s=limit_s)


def nix_build(
    node: Node,
    name: str,
    script: str,
    *options: str,
    features: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    status: int | None = 0,
    limit_s: float = 300,
) -> CompletedProcess[str]:
    """The same with Nix.  Without NIX_REMOTE=daemon in `env`, root's Nix builds by itself."""
    _prepare(node)
    needed = " ".join(json.dumps(feature) for feature in features)
    expression = f"""
      let shell = builtins.path {{ path = {SHELL}; name = "shell"; }};
      in derivation {{
        name = {json.dumps(name)}; system = "x86_64-linux"; builder = "${{shell}}/bin/sh"; PATH = "${{shell}}/bin";
        args = ["-c" {json.dumps(script).replace("$", chr(92) + "$")}]; requiredSystemFeatures = [{needed}];
      }}"""
    argv = ["nix-build", "--no-out-link", *options, "-E", expression]
    return node.run(*argv, env=env, status=status, limit_s=limit_s)
