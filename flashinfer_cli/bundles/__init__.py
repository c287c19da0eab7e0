"""Our own file format: records that one direct read brings in, made from any checkpoint, in plain safetensors."""

from .format import FORMAT_NAME, FORMAT_VERSION, MANIFEST_FILE, Manifest, RecordLayout, RecordPart, Source
from .layout import BundlePlan, PlannedFile
from .planner import plan_bundle
from .quantize import Quantization, chosen
from .reader import BundleCheckpoint, open_bundle, read_manifest
from .verify import verify_bundle
from .writer import write_bundle

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "BundleCheckpoint",
    "BundlePlan",
    "Manifest",
    "PlannedFile",
    "Quantization",
    "RecordLayout",
    "RecordPart",
    "Source",
    "chosen",
    "open_bundle",
    "plan_bundle",
    "read_manifest",
    "verify_bundle",
    "write_bundle",
]
