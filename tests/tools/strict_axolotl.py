"""Run by Axolotl's Python: what its validation drops from configurations or changes in them.

It drops what it doesn't know without a word. The last line printed has each file's [where, written, validated].
"""

import json
import sys
from pathlib import Path

import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

GPU = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def differences(written, validated, where=""):
    if isinstance(written, dict) and isinstance(validated, dict):
        for key, value in written.items():
            yield from differences(value, validated.get(key), f"{where}/{key}")
    elif isinstance(written, list) and isinstance(validated, list) and len(written) == len(validated):
        for place, (one, other) in enumerate(zip(written, validated, strict=True)):
            yield from differences(one, other, f"{where}/{place}")
    elif written != validated:
        yield [where, written, validated]


def check(config):
    written = yaml.safe_load(Path(config).read_text())
    raw = DictDefault(yaml.safe_load(Path(config).read_text()))
    prepare_plugins(raw)
    validated = validate_config(raw, capabilities=GPU, env_capabilities={"torch_version": "2.13.0"})
    return list(differences(written, validated.to_dict()))


answer = {config: check(config) for config in sys.argv[1:]}
print()
print(json.dumps(answer, default=str))
