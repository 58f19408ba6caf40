"""Copy the Python that runs this, and the shared libraries that it and Cairn load, to the root folder of an image.

    python3 deploy/image_root.py /opt/cairn /image

The image then has no shell, package manager or anything else to attack, and half the size of one that keeps its base.
Scanners find the Debian packages of what was copied in /var/lib/dpkg/status.d, where distroless images have them too;
each package's licence is in /usr/share/doc.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# What a server does not import of the standard library: half of it, and 6 MB of libraries that only this part loads.
UNUSED_MODULES = ("test", "idlelib", "tkinter", "turtledemo", "turtle.py", "ensurepip", "lib2to3", "pydoc_data")
UNUSED_EXTENSIONS = ("_tkinter.*", "_test*", "_ctypes_test.*", "_curses*", "_dbm.*", "_gdbm.*", "nis.*", "readline.*")
NO_PART_OF_IT = ("site-packages", "dist-packages", "config-*", "__pycache__")
UNUSED = shutil.ignore_patterns(*UNUSED_MODULES, *UNUSED_EXTENSIONS, *NO_PART_OF_IT)
# glibc loads these by name when it resolves a host's name; since 2.34 they are part of it
NAME_SERVICES = ("libnss_dns.so.2", "libnss_files.so.2")
# Without this file glibc asks the name servers before /etc/hosts.
NSSWITCH = "hosts: files dns\n"


def main(application: Path, image: Path) -> None:
    """Fill the new folder `image` with what `application`, a virtual environment, needs beside itself."""
    for folder in ("bin", "lib", "lib64", "sbin"):  # Debian's merged /usr
        (image / "usr" / folder).mkdir(parents=True, exist_ok=True)
        (image / folder).symlink_to(f"usr/{folder}")
    copied = [*copy_python(image)]
    objects = [*executables(image), *executables(application)]
    libraries = {library for each in objects for library in libraries_of(each)}
    copied += [copy_file(library, image) for library in sorted(libraries.union(name_services()))]
    (image / "etc").mkdir()
    (image / "etc" / "nsswitch.conf").write_text(NSSWITCH)
    shutil.copy("/etc/os-release", image / "etc" / "os-release")
    for package in sorted({name for path in copied if (name := package_of(path))}):
        describe(package, image)
    # Python's own image has libpython in /usr/local/lib, which the loader finds only by its cache
    shutil.copytree("/etc/ld.so.conf.d", image / "etc" / "ld.so.conf.d")
    shutil.copy("/etc/ld.so.conf", image / "etc" / "ld.so.conf")
    subprocess.run(["/sbin/ldconfig", "-r", str(image)], check=True)


def copy_python(image: Path) -> Iterator[Path]:
    """Copy the interpreter and its standard library, byte-compiled; yields what was copied."""
    binary = Path(sys.executable).parent.resolve() / Path(sys.executable).name
    for path in links(binary):
        yield copy_file(path, image, follow=False)
    library = Path(sysconfig.get_path("stdlib")).resolve()
    target = inside(image, library)
    shutil.copytree(library, target, ignore=UNUSED, symlinks=False)
    yield from (library / "os.py", library / "asyncio" / "base_events.py")  # Debian packs them apart
    compile_all = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([sys.executable, *compile_all, "-s", str(image), "-p", "/", str(target)], check=True)


def links(path: Path) -> Iterator[Path]:
    """Yield `path` and, while it is a symbolic link, what it points to."""
    yield path
    while path.is_symlink():
        path = path.parent / path.readlink()
        yield path


def executables(folder: Path) -> Iterator[Path]:
    """Yield the ELF files in `folder`."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.suffix != ".py":
            with path.open("rb") as stream:
                if stream.read(4) == b"\x7fELF":
                    yield path


def libraries_of(path: Path) -> Iterator[Path]:
    """Yield the shared libraries of the system that the ELF file `path` loads, directly or not."""
    output = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
    if missing := re.findall(r"(\S+) => not found", output):
        sys.exit(f"{path} needs {', '.join(missing)}, which the base image does not have")
    for found in re.findall(r"(?:=> |^\s*)(/\S+) \(0x", output, re.MULTILINE):
        if "site-packages" not in found:  # a library that a package brings along
            yield Path(found)


def name_services() -> Iterator[Path]:
    """Yield the name service modules that this glibc has."""
    for folder in (Path("/lib"), Path("/usr/lib")):
        for name in NAME_SERVICES:
            yield from folder.glob(f"*-linux-gnu/{name}")


def copy_file(path: Path, image: Path, *, follow: bool = True) -> Path:
    """Copy `path` to the same place in `image`; returns `path`."""
    target = inside(image, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(path, target, follow_symlinks=follow)
    return path


def inside(image: Path, path: Path) -> Path:
    """Return where `path` is in `image`, with the links in its folder resolved."""
    return image / path.parent.resolve().relative_to("/") / path.name


def package_of(path: Path) -> str | None:
    """Return the Debian package that `path` belongs to, or None; dpkg knows the name of a file when it was packed."""
    resolved = path.parent.resolve() / path.name
    for name in (path, resolved, Path(str(resolved).removeprefix("/usr")), resolved.resolve()):
        found = subprocess.run(["dpkg-query", "--search", str(name)], capture_output=True, text=True, check=False)
        if found.returncode == 0:
            return found.stdout.split(":")[0]
    return None


def describe(package: str, image: Path) -> None:
    """Copy the licence of `package`, and write its control data for scanners."""
    status = image / "var" / "lib" / "dpkg" / "status.d"
    status.mkdir(parents=True, exist_ok=True)
    control = subprocess.run(["dpkg-query", "--status", package], capture_output=True, text=True, check=True).stdout
    (status / package).write_text(control)
    documents = Path("/usr/share/doc", package)
    if documents.is_symlink():  # to those of another package from the same source
        copy_file(documents, image, follow=False)
    if (documents / "copyright").exists():
        copy_file(documents / "copyright", image)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
