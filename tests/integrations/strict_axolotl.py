"""Run by Axolotl's Python: what its validation drops from a configuration or changes in it.

It drops what it doesn't know without a word. The last line printed has [where, written, validated] of each.
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


written = yaml.safe_load(Path(sys.argv[1]).read_text())
config = DictDefault(yaml.safe_load(Path(sys.argv[1]).read_text()))
prepare_plugins(config)
validated = validate_config(config, capabilities=GPU, env_capabilities={"torch_version": "2.13.0"})
print()
print(json.dumps(list(differences(written, validated.to_dict())), default=str))
