"""Run by Axolotl's Python: what the plugin says of each configuration in a JSON file, as a JSON list."""

import json
import sys
from pathlib import Path

from axolotl.utils.dict import DictDefault

from splaser_plugin.errors import SplaserError
from splaser_plugin.integrations.axolotl import SPLaserPlugin

answers = []
for config in json.loads(Path(sys.argv[1]).read_text()):
    try:
        SPLaserPlugin().register(DictDefault(config))
        answers.append("accepted")
    except SplaserError as error:
        answers.append(f"{type(error).__name__}: {error}")
print()
print(json.dumps(answers))
