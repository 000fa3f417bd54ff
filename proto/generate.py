"""Generate the stubs of the wire contract.

Usage: generate.py [OUTPUT_FOLDER]   (default: the SDK, clients/python)
"""

import sys
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
SDK = PROTO.parent / "clients" / "python"
# The files that have services.
SERVICES = ("kvbank/v1/access.proto", "kvbank/v1/service.proto", "kvbank/v1/session.proto")


def generate(output: Path) -> None:
    """Write `kvbank/v1/*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` below `output`."""
    files = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("kvbank/v1/*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    arguments = [f"-I{PROTO}", f"-I{include}", f"--python_out={output}", f"--pyi_out={output}"]
    if protoc.main(["protoc", *arguments, *files]) != 0:
        raise SystemExit("protoc failed")
    if protoc.main(["protoc", *arguments[:2], f"--grpc_python_out={output}", *SERVICES]) != 0:
        raise SystemExit("protoc failed")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else SDK)
