"""The manifest: what to merge, as a typed value. `load_manifest` makes one; nothing here opens a source.

references   names of places
parameters   values with gradients and filters, and how one is resolved for a tensor
grammar      the typed manifest
documents    YAML text → plain data with its lines
several      several documents of one file as one
checks       what goes beyond the shape
later        what is not built yet
load         all of it in order
bulk         many merges from one manifest
"""

from merger.manifest.bulk import BulkMerge, Found, expand_bulk
from merger.manifest.grammar import (
    AdapterEntry,
    BulkEntry,
    BulkManifest,
    Expert,
    Manifest,
    ModelEntry,
    Module,
    Output,
    OutputQuantization,
    S3Output,
    Schedule,
    Slice,
    SliceSource,
    Store,
    TakeFrom,
    Tokenizer,
    TokenSpec,
)
from merger.manifest.load import load_documents, load_manifest
from merger.manifest.parameters import (
    Clause,
    ParameterValue,
    layer_position,
    parameter_specs,
    parse_parameter_value,
    resolve_parameter,
)
from merger.manifest.references import ModelReference, Reference, parse_model_reference, parse_reference
from merger.manifest.several import documents_named

__all__ = [
    "AdapterEntry",
    "BulkEntry",
    "BulkManifest",
    "BulkMerge",
    "Clause",
    "Expert",
    "Found",
    "Manifest",
    "ModelEntry",
    "ModelReference",
    "Module",
    "Output",
    "OutputQuantization",
    "ParameterValue",
    "Reference",
    "S3Output",
    "Schedule",
    "Slice",
    "SliceSource",
    "Store",
    "TakeFrom",
    "TokenSpec",
    "Tokenizer",
    "documents_named",
    "expand_bulk",
    "layer_position",
    "load_documents",
    "load_manifest",
    "parameter_specs",
    "parse_model_reference",
    "parse_parameter_value",
    "parse_reference",
    "resolve_parameter",
]
