"""Our own file format: records that one direct read brings in, made from any checkpoint, in plain safetensors."""

from .format import FORMAT_NAME, FORMAT_VERSION, MANIFEST_FILE, Manifest, RecordLayout, RecordPart, Source
from .layout import BundlePlan, PlannedFile, plan_bundle
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
    "RecordLayout",
    "RecordPart",
    "Source",
    "open_bundle",
    "plan_bundle",
    "read_manifest",
    "verify_bundle",
    "write_bundle",
]
