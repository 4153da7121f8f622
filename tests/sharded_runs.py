"""One search under every way to spread a model over two: `torchrun ... tests/sharded_runs.py FOLDER MODEL WAY...`.

Alone (`python tests/sharded_runs.py FOLDER MODEL`) it is done in one process, without and with LoRA. Each way writes
FOLDER/WAY.json: the recipe of a search after training and an evaluation, that of a search before training, for
DeepSpeed that of one while the trainer is made too, and the logits of what was saved; or FOLDER/WAY.txt: what it was
refused with. The ways of ZERO need DeepSpeed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import splaser_plugin.distributed
import splaser_plugin.weights.zero as zero
from splaser_plugin import LaserCallback, LaserConfig, apply, laser
from splaser_plugin.artifacts.recipe import Recipe
from splaser_plugin.distributed import is_main
from splaser_plugin.errors import SplaserError

LAYER = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
NO_WRAP = {"version": 2, "auto_wrap_policy": "NO_WRAP"}
SIZE = {"version": 2, "auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 1_000_000}
"""accelerate 1.15 wraps the head by its size, and then again with the last norm, which torch refuses."""
FSDP: dict[str, dict[str, Any]] = {
    "layers": {"fsdp": "full_shard auto_wrap", "fsdp_config": LAYER},
    "layers-kept": {"fsdp": "shard_grad_op auto_wrap", "fsdp_config": {**LAYER, "reshard_after_forward": False}},
    "fsdp1": {
        "fsdp": "full_shard",
        "fsdp_config": {"version": 1, "sync_module_states": False, "cpu_ram_efficient_loading": False},
    },
    "no-wrap": {"fsdp": "full_shard", "fsdp_config": NO_WRAP},
    "no-wrap-kept": {"fsdp": "shard_grad_op", "fsdp_config": {**NO_WRAP, "reshard_after_forward": False}},
    "size": {"fsdp": "full_shard auto_wrap", "fsdp_config": SIZE},
}
FSDP2 = [way for way in FSDP if way not in ("fsdp1", "size")]
ZERO: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "zero3-layers": {
        "stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 100,
    },
}  # fmt: skip
"""DeepSpeed's `zero_optimization`; in the last no whole model fits into a process, and vectors alone stay whole."""
ZERO_WAYS = (*ZERO, "lora-zero1", "lora-zero2", "lora-zero3", "lora-zero3-layers", "own-zero2", "own-zero3")
OWN_ZERO = ("own-zero2", "own-zero3")
"""In a loop of one's own, without a trainer."""
RESUMED = ("lora-one", "lora-zero1", "lora-zero2", "lora-zero3")
OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
ZERO_REFUSED = {
    "zero3-no-room": ZERO["zero3"],
    "zero2-offload": OFFLOADED,
    "own-zero2-offload": OFFLOADED,
    "own-zero2-offload-module": OFFLOADED,
    "own-zero3-offload-module": OFFLOADED | {"stage": 3},
    "own-zero0": {"stage": 0},
    "own-zero0-module": {"stage": 0},
}
"""In the last ones `laser` is given what is inside the engine."""
SPREAD = ("tp", "tp-plan", "own-fsdp", "loaded-fsdp")
"""By torch or by transformers itself, without a trainer."""
LOADED = {"tp": {"tp_size": 2}, "loaded-fsdp": {"fsdp_size": 2}}
"""transformers' `DistributedConfig`."""
IN_TRAINER = tuple(f"trainer-{way}" for way in LOADED)
WAYS = ("ddp", *FSDP2, "lora-ddp", *(f"lora-{way}" for way in FSDP2), *SPREAD, *IN_TRAINER)
REFUSED = ("fsdp1", "size", "main-alone")
AFTER = LaserConfig(
    embedder="self", max_new_tokens=6, candidates=6, edge="mp", batch_size=2, include=("lm_head", "down_proj", "q_proj")
)
BEFORE = LaserConfig(scorer="margin", candidates=8, edge="mp", batch_size=2)
PAIRS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "Bananas."},
    {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "Ask somebody else."},
    {"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away."},
]


class Way:
    """One way, with the models and files it needs."""

    def __init__(self, name: str, folder: Path, source: str) -> None:
        self.name = name
        self.folder = folder
        self.source = source
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self._engine: Any = None

    @property
    def sharding(self) -> dict[str, Any]:
        """The trainer's arguments for it."""
        zero_optimization = ZERO_REFUSED.get(self.name) or ZERO.get(self.plain)
        return FSDP.get(self.plain, {}) if zero_optimization is None else zero_arguments(zero_optimization)

    @property
    def plain(self) -> str:
        """Its name without LoRA, and without who spreads the model."""
        return self.name.removeprefix("lora-").removeprefix("own-").removeprefix("trainer-")

    @property
    def shards(self) -> bool:
        """Whether accelerate has to be told that the CPU is its device."""
        return bool(self.sharding) or self.name == "trainer-tp"

    def model(self, **arguments: Any) -> Any:
        if loaded := LOADED.get(self.plain):
            from transformers.distributed import DistributedConfig

            arguments["distributed_config"] = DistributedConfig(**loaded)
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32, **arguments)
        if not self.name.startswith("lora-"):
            return model
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        lora = LoraConfig(
            r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], init_lora_weights=False,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        return get_peft_model(model, lora)

    def trainer(self, callback: LaserCallback | None, out: Path, **changes: Any) -> Trainer:
        """A real one: of one step, too small to change a weight, with an evaluation."""
        ids = self.tokenizer("The cat sat on the mat and looked out.")["input_ids"]
        rows = Dataset.from_list([{"input_ids": ids, "labels": ids}] * 4)
        settings = {
            "output_dir": str(out), "max_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-9,
            "report_to": [], "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 1, "disable_tqdm": True,
            "optim": "adamw_torch", "use_cpu": not self.shards,
        }  # fmt: skip
        arguments = TrainingArguments(**{**settings, **self.sharding, **changes})  # first: ZeRO-3 loads in parts
        return Trainer(
            self.model(), arguments, train_dataset=rows, eval_dataset=rows, processing_class=self.tokenizer,
            callbacks=[callback] if callback else [],
        )  # fmt: skip

    def trained(self, when: str, config: LaserConfig, **freezing: Any) -> tuple[Recipe, Path]:
        out = self.folder / f"{self.name}-{when}"
        callback = LaserCallback(when=when, pairs=PAIRS, config=config, **freezing)
        trainer = self.trainer(callback, out)
        trainer.train()
        if freezing:
            trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
            assert trained == {f"{name}.weight" for name in callback.selection.names}
        if when != "after":
            trainer.save_model(str(out / "saved"))
        return callback.result.recipe, out / ("lasered" if when == "after" else "saved")

    def resumed(self) -> tuple[list[float], list[float]]:
        """Evaluation losses of two steps after a search before training, and of the second one alone, resumed."""
        losses, out = [], self.folder / f"{self.name}-resumed"
        for checkpoint in (None, str(out / "checkpoint-1")):
            callback = LaserCallback(when="before", pairs=PAIRS, config=BEFORE)
            trainer = self.trainer(callback, out, max_steps=2, save_strategy="steps", save_steps=1)
            trainer.train(resume_from_checkpoint=checkpoint)
            losses.append([log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
        return losses[0], losses[1]

    def own(self, model: Any, config: LaserConfig) -> tuple[Recipe, Path]:
        """`laser` on a model that its owner spread."""
        result = laser(model, PAIRS, config=config, tokenizer=self.tokenizer)
        out = self.folder / f"{self.name}-{config.scorer}"
        result.save(out)
        return result.recipe, out

    def spread(self) -> Any:
        if self.name.startswith("own-zero"):
            import deepspeed

            model, settings = self.model(), self.sharding["deepspeed"] | {"train_micro_batch_size_per_gpu": 1}
            if "zero0" in self.name:
                settings["bf16"] = {"enabled": True}  # the weights of which an optimizer has copies
            self._engine = deepspeed.initialize(
                model=model, optimizer=torch.optim.AdamW(model.parameters()), config=settings
            )[0]  # fmt: skip
            return self._engine.module if self.name.endswith("module") else self._engine
        if self.name == "own-fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            model = self.model()
            for layer in model.model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), reshard_after_forward=False)
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            register_fsdp_forward_method(model, "generate")
            return model
        return self.model(tp_plan="auto") if self.name == "tp-plan" else self.model()

    def refused(self) -> str:
        """What is said to what can't be done, or to a `laser` that only the main process calls; a line for each."""
        if self.name.startswith("own-"):
            model = self.spread()
            works = [partial(self.own, model, AFTER), partial(apply, "no-recipe.json", model)]
        elif self.name == "size":
            works = [self.trainer(None, self.folder / self.name).train, partial(self.trained, "after", AFTER)]
        elif self.name != "main-alone":
            works = [partial(self.trained, "init" if self.name == "zero3-no-room" else "after", AFTER)]
        else:
            works = [partial(self.own, self.model(), AFTER)] if is_main() else []
        said = []
        for work in works:
            try:
                work()
            except (SplaserError, TypeError) as error:
                said.append(f"{type(error).__name__}: {error}")
        return "\n".join(said)

    def run(self) -> None:
        if self.name in (*REFUSED, *ZERO_REFUSED):
            said = self.refused()
            dist.barrier()
            if is_main():
                (self.folder / f"{self.name}.txt").write_text(said)
            return
        if self.name in (*SPREAD, *OWN_ZERO):
            found = {"after": self.own(self.spread(), AFTER), "before": self.own(self.spread(), BEFORE)}
        else:
            found = {"after": self.trained("after", AFTER), "before": self.trained("before", BEFORE)}
            if self.name in ("one", "zero1", "zero2", "zero3"):
                found["init"] = self.trained("init", BEFORE, freeze_to="top", top=1)
            if self.name in RESUMED:
                found["init"] = self.trained("init", BEFORE)
        if dist.is_initialized():
            dist.barrier()
        if is_main():
            written = {
                when: {"steps": recipe.to_dict()["steps"], "scores": dict(recipe.scores), "logits": self.logits(saved)}
                for when, (recipe, saved) in found.items()
            }
            (self.folder / f"{self.name}.json").write_text(json.dumps(written))
        if self.name in RESUMED:
            losses = self.resumed()
            if is_main():
                (self.folder / f"{self.name}-resumed.json").write_text(json.dumps(losses))
        if dist.is_initialized():
            dist.barrier()

    def logits(self, saved: Path) -> list[float]:
        """What the saved model says: some logits, adapters left out, since only the base is in what they belong to."""
        if not (saved / "config.json").is_file():
            return []
        unset_hf_deepspeed_config()  # else what is loaded would be sharded too
        with torch.no_grad():
            found = AutoModelForCausalLM.from_pretrained(saved)(torch.arange(5, 25)[None]).logits
        return found[0, :, ::4999].flatten().tolist()


def zero_arguments(zero_optimization: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The trainer's arguments for DeepSpeed. more: of its configuration."""
    return {
        "deepspeed": {
            "zero_optimization": {"overlap_comm": False, **zero_optimization},
            "train_micro_batch_size_per_gpu": "auto",
            "zero_allow_untrusted_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            **more,
        }
    }


@contextmanager
def sharding_on_cpus() -> Iterator[None]:
    """Tell accelerate that the CPU is its device: it shards nothing where it is asked for CPUs alone."""
    own = PartialState._prepare_backend
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, cpu, sm, backend=None: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = own
        del os.environ["ACCELERATE_TORCH_DEVICE"]


def deepspeed_on_cpus() -> None:
    """Tell DeepSpeed the same, and not to build a faster way to communicate, which takes minutes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    torch.set_num_threads(1)
    folder, source = Path(sys.argv[1]), sys.argv[2]
    ways = sys.argv[3:] if "RANK" in os.environ else ("one", "lora-one")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name in ways:
        if "zero" in name:
            deepspeed_on_cpus()
        splaser_plugin.distributed.PATIENCE_S = 2.0 if name == "main-alone" else 300.0
        zero.MOST_OF_MEMORY = 0.0 if name.endswith(("zero3-layers", "no-room")) else 0.8
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
        for variable in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_"))]:
            del os.environ[variable]
        print(f"--- {name}", file=sys.stderr, flush=True)
        way = Way(name, folder, source)
        with sharding_on_cpus() if way.shards else nullcontext():
            way.run()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
