"""A Debian source package that takes seconds to build, and needs a package that no guest has from the start."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

_CONTROL = """\
Source: greeting
Maintainer: A <a@example.org>
Build-Depends: bc
Standards-Version: 4.6.0

Package: greeting
Architecture: any
Description: a greeting
 It greets.
"""
_CHANGELOG = """\
greeting (1.0) unstable; urgency=low

  * First.

 -- A <a@example.org>  Wed, 01 Jan 2025 00:00:00 +0000
"""
# Without debhelper, which takes longer to install than all else.
_RULES = """\
#!/usr/bin/make -f
build build-arch:
	echo "6 * 7" | bc >answer
binary binary-arch: build
	mkdir -p debian/tmp/DEBIAN debian/tmp/usr/share/greeting
	cp answer debian/tmp/usr/share/greeting
	dpkg-gencontrol -pgreeting
	dpkg-deb --root-owner-group --build debian/tmp ..
clean:
	rm -rf debian/tmp debian/files answer
build-indep binary-indep:
.PHONY: build build-arch build-indep binary binary-arch binary-indep clean
"""
_FILES = {
    "debian/source/format": "3.0 (native)\n",
    "debian/control": _CONTROL,
    "debian/changelog": _CHANGELOG,
    "debian/rules": _RULES,
}


def write_greeting(folder: Path) -> Path:
    """Write the source package into `folder`; its .dsc."""
    archive = folder / "greeting_1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in _FILES.items():
            member = tarfile.TarInfo(f"greeting-1.0/{name}")
            member.size, member.mode, member.mtime = len(text), 0o755 if name.endswith("rules") else 0o644, 1735689600
            tar.addfile(member, io.BytesIO(text.encode()))
    content = archive.read_bytes()
    fields = {
        "Format": "3.0 (native)",
        "Source": "greeting",
        "Binary": "greeting",
        "Architecture": "any",
        "Version": "1.0",
        "Maintainer": "A <a@example.org>",
        "Build-Depends": "bc",
        "Checksums-Sha256": f"\n {hashlib.sha256(content).hexdigest()} {len(content)} {archive.name}",
        "Files": f"\n {hashlib.md5(content, usedforsecurity=False).hexdigest()} {len(content)} {archive.name}",
    }
    dsc = folder / "greeting_1.0.dsc"
    dsc.write_text("".join(f"{name}: {value}\n" for name, value in fields.items()))
    return dsc
