"""Which files of a tree the patterns of the outputs mean."""

import os
import stat


def matches(name, pattern):
    """Whether one component of a path matches one of a pattern: `*`, `?`, `[abc]`, `[a-z]`, `[!a]`, as the shell has them."""
    if name.startswith(b".") and not pattern.startswith(b"."):
        return False
    return _matches(name, pattern)


def _matches(name, pattern):
    at_name = at = 0
    star, star_name = -1, 0
    while at_name < len(name):
        length, fits = _match_one(pattern, at, name[at_name]) if at < len(pattern) else (0, False)
        if length and pattern[at] == 0x2A:
            star, star_name, at = at, at_name, at + 1
        elif fits:
            at, at_name = at + length, at_name + 1
        elif star >= 0:
            star_name += 1
            at, at_name = star + 1, star_name
        else:
            return False
    return not pattern[at:].strip(b"*")


def _match_one(pattern, at, byte):
    """(length of the pattern's item at `at`, whether it fits `byte`); a `[` without its `]` stands for itself."""
    if pattern[at] == 0x3F or pattern[at] == 0x2A:
        return 1, True
    if pattern[at] == 0x5B:
        negative = pattern[at + 1 : at + 2] in (b"!", b"^")
        first = at + 1 + negative
        end = pattern.find(b"]", first + 1)
        if end > 0:
            return end + 1 - at, _in_set(pattern[first:end], byte) != negative
    return 1, pattern[at] == byte


def _in_set(items, byte):
    at = 0
    while at < len(items):
        if items[at + 1 : at + 2] == b"-" and at + 2 < len(items):
            if items[at] <= byte <= items[at + 2]:
                return True
            at += 3
        else:
            if items[at] == byte:
                return True
            at += 1
    return False


def is_directory(path):
    """Whether it is one itself, and not a link to one: links are sent, never followed."""
    try:
        return stat.S_ISDIR(os.lstat(path or b".").st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def tree(path):
    """`path` and, when it is a directory, everything below it, each directory before what is in it."""
    waiting = [path]
    while waiting:
        path = waiting.pop()
        yield path
        if is_directory(path):
            waiting += [os.path.join(path, name) for name in sorted(os.listdir(path or b"."), reverse=True)]


def expand(parts, at=b""):
    """The paths that the components `parts` of a pattern match below the directory `at`; `**` is any number of directories."""
    if not parts:
        yield at
        return
    if not is_directory(at):
        return
    first, rest = parts[0], parts[1:]
    if first == b"**":
        for path in [path for path in tree(at) if is_directory(path)]:
            yield from expand(rest, path)
    elif first.translate(None, b"*?[") != first:
        for name in sorted(os.listdir(at or b".")):
            if matches(name, first):
                yield from expand(rest, os.path.join(at, name))
    elif os.path.lexists(os.path.join(at, first)):
        yield from expand(rest, os.path.join(at, first))
