"""Run by LLaMA-Factory's Python: parse a configuration as strictly as its command line does.

A YAML's values are taken as they are, so that a wrong one goes unseen; the command line checks each one's type.
"""

import json
import sys
from pathlib import Path

from llamafactory.hparams.parser import _TRAIN_ARGS
from omegaconf import OmegaConf
from transformers import HfArgumentParser

values = OmegaConf.to_container(OmegaConf.load(Path(sys.argv[1])))
values.update(bf16=False)
arguments = [part for key, value in values.items() for part in (f"--{key}", str(value))]
*_, unknown = HfArgumentParser(_TRAIN_ARGS).parse_args_into_dataclasses(args=arguments, return_remaining_strings=True)
print()
print(json.dumps(unknown))
