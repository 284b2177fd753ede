"""What a begin frame asks for, checked."""

from build_service.frames import Trouble

PROTOCOL = 3
PERSONALITIES = (None, "linux32")

BEGIN_FIELDS = {
    "protocol": (int,),
    "build": (str,),
    "environment": (str, type(None)),
    "source": (str, type(None)),
    "scratch": (str, type(None)),
    "personality": (str, type(None)),
    "network": (bool,),
    "date": (int, float, type(None)),
    "directory": (str,),
    "steps": (list,),
    "env": (dict,),
    "outputs": (list,),
    "keep_failed": (bool,),
}


def check_begin(begin):
    """The begin frame's fields, each of the right type and safe to make a path of."""
    if not isinstance(begin, dict) or set(begin) != set(BEGIN_FIELDS):
        raise Trouble("the begin frame must have the fields {}".format(", ".join(BEGIN_FIELDS)))
    for name, types in BEGIN_FIELDS.items():
        if type(begin[name]) not in types:
            raise Trouble(f"field {name} of the begin frame is of the wrong type")
    if begin["protocol"] != PROTOCOL:
        raise Trouble(f"protocol {begin['protocol']} is asked for, this build service speaks {PROTOCOL}")
    if begin["personality"] not in PERSONALITIES:
        raise Trouble("there is no personality {!r}".format(begin["personality"]))
    texts = [*begin["steps"], *begin["outputs"], *begin["env"].values(), *begin["env"], begin["directory"]]
    texts += [begin[name] or "" for name in ("environment", "source", "scratch")]
    if not all(isinstance(text, str) and "\0" not in text for text in texts):
        raise Trouble("steps, outputs and env of the begin frame must be texts")
    build = begin["build"]
    if (
        not build
        or build[0] == "."
        or not build.replace("-", "").replace("_", "").replace(".", "").isalnum()
        or not build.isascii()
    ):
        raise Trouble(f"{build!r} is not the name of a build")
    parts = begin["directory"].split("/")
    if parts[0] or len(parts) < 3 or any(part in ("", ".", "..") for part in parts[1:]):
        raise Trouble("{!r} is not a directory to build in".format(begin["directory"]))
    for pattern in begin["outputs"]:
        if pattern.startswith("/") or ".." in pattern.split("/"):
            raise Trouble(f"output {pattern!r} leaves the build directory")
    return begin
