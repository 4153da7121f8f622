# Runs in the real tools; needs $(BIN) and `models` of the main Makefile, which includes this file.
TOOLS := .integrations

.PHONY: test-integrations

$(TOOLS)/%/.installed: tests/tools/%.txt tests/tools/build.sh pyproject.toml
	PYTHON=$(PYTHON) tests/tools/build.sh $* $(@D)

test-integrations: models $(foreach tool,llamafactory axolotl deepspeed vllm,$(TOOLS)/$(tool)/.installed)
	SPLASER_INTEGRATIONS=$(CURDIR)/$(TOOLS) $(BIN)/python -m pytest tests/tools tests/integrations/test_sharded.py
