"""Command settings: what each command but `train` takes, and what `train`, `plan` and `sweep` add to a run's settings.

The settings of the run itself are in run_settings.py.
"""

from typing import Any

from pydantic.dataclasses import dataclass

from atomtune.choices import (
    CHECKS,
    USUAL_BATCH,
    Dtype,
    EngineName,
    ExportTarget,
    FormatChoice,
    GgufFormat,
    Quantize,
    ServeEngine,
)
from atomtune.settings.declare import (
    STRICT,
    answer_setting,
    keys_setting,
    other_base_setting,
    roles_setting,
    seed_setting,
    setting,
)
from atomtune.settings.run_settings import (
    LoraSettings,
    ModelSettings,
    RecordSettings,
    StoredBaseSettings,
    TokenizerSettings,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VerifySettings(RecordSettings, ModelSettings, LoraSettings):
    """Verify"""

    records: int = setting(32, "how many records to compare, chosen at random", at_least=1, unit="records")
    per_device_train_batch_size: int | None = setting(
        None, f"records in a batch, as the run will have them; default: {USUAL_BATCH}", at_least=1, unit="records"
    )
    seed: int = seed_setting("seed for choosing the records")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InspectSettings(RecordSettings, TokenizerSettings):
    """Inspect"""

    html: str | None = setting(None, "write the report to this file, as one web page", value="FILE")
    json: bool = setting(
        False, "print the counts of records and tokens as JSON on standard output, and nothing else there"
    )
    fail_on: list[str] = setting(
        [],
        "end with exit code 4 if a check finds more than allowed, for example cut duplicates=5% control=10; checks: "
        f"{', '.join(CHECKS)}",
        value="CHECK",
    )
    samples: int = setting(3, "how many records to show token by token", at_least=0, unit="records")
    per_device_train_batch_size: int | None = setting(
        None,
        f"records in a batch, to estimate what sharing saves; default: {USUAL_BATCH}",
        at_least=1,
        rare=True,
        unit="records",
    )
    seed: int = seed_setting("seed for choosing the records to show", rare=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainedModelSettings(ModelSettings):
    """Model"""

    quantize: Quantize | None = setting(
        None,
        "keep the base model in 4 bits (nf4) or 8 bits (int8) to save memory; default: as in training; needs "
        "atomtune[qlora]",
    )
    stored_base: bool = setting(
        False,
        "for an adapter that was trained on a quantized base: use the base's weights as they are stored, not as "
        "training rounded them",
        rare=True,
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MergeSettings(TokenizerSettings):
    """Merge"""

    adapter_path: str | list[str] = setting(
        ...,
        "the output folder of a run, or one of its checkpoints; several are summed as --weights says",
        value="FOLDER",
    )
    weights: list[float] = setting(
        [],
        "with several adapters: how much of each, for example 0.7 0.3; 0.5 0.5 is the mean of two, 1 1 their sum",
        value="X",
    )
    stored_base: bool = setting(
        False,
        "for an adapter that was trained on a quantized base: merge into the base's weights as they are stored, not as "
        "training rounded them",
        rare=True,
    )
    output_dir: str = setting(..., "folder for the merged model", value="FOLDER")
    other_base: bool = other_base_setting(rare=True)
    dtype: Dtype = setting("auto", "number format of the merged weights; auto: as the base model is stored")

    @property
    def adapter_paths(self) -> list[str]:
        return [self.adapter_path] if isinstance(self.adapter_path, str) else self.adapter_path


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoadSettings(TrainedModelSettings):
    """Model"""

    adapter_path: str = setting(
        ..., "the output folder of a run, one of its checkpoints, or a merged model", value="FOLDER"
    )
    system: str | None = setting(None, "instruction that a conversation starts with", value="TEXT")
    other_base: bool = other_base_setting(rare=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ChatSettings(LoadSettings):
    """Chat"""

    prompt: str | None = setting(None, "answer this and exit; without it, a conversation starts", value="TEXT")
    compare: bool = setting(False, "also show the base's answer, with the adapter switched off")
    max_new_tokens: int = answer_setting(512, "longest answer, in tokens")
    temperature: float = setting(
        0.0, "0 always takes the most likely token; the higher, the more varied the answers", at_least=0
    )
    top_p: float | None = setting(
        None,
        "with --temperature: sample from the likeliest tokens that together have this probability [the base's own]",
        more_than=0,
        at_most=1,
    )
    top_k: int | None = setting(
        None, "with --temperature: sample from this many of the likeliest tokens; 0: all [the base's own]", at_least=0
    )
    repetition_penalty: float | None = setting(
        None,
        "above 1: tokens that were already used become less likely [the base's own]",
        at_least=0.1,
        at_most=10,
    )
    seed: int = seed_setting("seed of the first sampled answer; each later answer uses the next seed", default=0)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WebSettings(LoadSettings):
    """Web"""

    max_new_tokens: int = answer_setting(512, "longest answer, in tokens; the page can change it")
    host: str = setting(
        "127.0.0.1", "address to listen on; anything but this machine's own needs --password", value="ADDRESS"
    )
    port: int = setting(7860, "port to listen on", at_least=1, at_most=65535)
    password: str | None = setting(
        None,
        "password that visitors must enter, with the user name atomtune [the environment variable ATOMTUNE_PASSWORD]",
        value="TEXT",
    )
    open: bool = setting(False, "open the page in this machine's browser")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluateSettings(TrainedModelSettings):
    """Evaluate"""

    adapter_path: list[str] = setting(
        [], "one or more adapters: a run's output folder or one of its checkpoints", value="FOLDER"
    )
    dataset_path: str | list[str] | None = setting(
        None, "records to evaluate on; without it, those that the first adapter's run held out", value="FILE"
    )
    format: FormatChoice = setting("auto", "format of the records; auto detects it from the first records of each file")
    keys: list[str] = keys_setting()
    roles: list[str] = roles_setting()
    template: str = setting("auto", "chat template of a base without an adapter; an adapter brings its own", rare=True)
    chat_template_kwargs: str | None = setting(
        None, "variables of that template, as a JSON object; an adapter brings its own", value="JSON", rare=True
    )
    max_seq_length: int = setting(
        0,
        "longest example, in tokens; 0: as the adapter was trained, or 2,048 if that is not known, less on a smaller "
        "base",
        at_least=0,
        unit="tokens",
    )
    records: int = setting(200, "how many records at most, chosen at random; 0: all", at_least=0, unit="records")
    per_device_eval_batch_size: int = setting(8, "records in a batch", at_least=1, unit="records")
    max_new_tokens: int = answer_setting(256, "longest generated answer, in tokens")
    no_generate: bool = setting(False, "compute only the likelihood of the reference answers; much faster")
    no_probe: bool = setting(False, "skip the forgetting probe")
    lm_eval_tasks: list[str] = setting(
        [],
        "also benchmarks of lm-evaluation-harness, for example arc_easy,hellaswag; a .yaml file of your own task, or a "
        "folder of such files",
        value="TASK",
    )
    lm_eval_limit: int = setting(0, "questions of each of these tasks; 0: all", at_least=0, unit="questions")
    output_dir: str | None = setting(
        None,
        "where the reports go; without it, evaluation/ in the first adapter's folder, evaluation-1/ beside the report "
        "of another evaluation",
        value="FOLDER",
    )
    other_base: bool = other_base_setting()
    seed: int = seed_setting("seed for the choice of records and for the intervals")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CertifySettings(StoredBaseSettings):
    """Certify"""

    adapter_path: str = setting(..., "the trained adapter: a run's output folder or a checkpoint", value="FOLDER")
    served: str | None = setting(
        None, "what the engine serves, if not the adapter: a merged folder or a .gguf", value="FOLDER_OR_FILE"
    )
    engine: list[EngineName] = setting(
        [], "engines to start; without it, llama.cpp for a .gguf and transformers for a folder"
    )
    prompts: int = setting(10, "how many prompts are sent, of several kinds", at_least=1, unit="prompts")
    max_new_tokens: int = answer_setting(32, "longest greedy answer that is compared, in tokens")
    other_base: bool = other_base_setting()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServeSettings(StoredBaseSettings):
    """Serve"""

    adapter_path: list[str] = setting(
        ...,
        "the trained adapter: a run's output folder or a checkpoint; several, for vllm: requests choose by folder name",
        value="FOLDER",
    )
    served: str | None = setting(
        None, "what the engine serves, if not the adapter: a merged folder or a .gguf", value="FOLDER_OR_FILE"
    )
    engine: ServeEngine = setting(
        "auto",
        "the program that serves; auto: vllm on a GPU if it is installed, llama.cpp for a .gguf, else transformers",
    )
    host: str = setting(
        "127.0.0.1", "address to listen on; anything but this machine's own needs --api_key", value="ADDRESS"
    )
    port: int = setting(8000, "port to listen on", at_least=1, at_most=65535)
    api_key: str | None = setting(
        None,
        "refuse requests without this key [the environment variable ATOMTUNE_API_KEY]; works with vllm and llama.cpp",
        value="KEY",
    )
    context: int = setting(0, "longest conversation, in tokens; 0: as the engine chooses", at_least=0, unit="tokens")
    no_certify: bool = setting(False, "do not check first that the engine serves the tuned model")
    device_map: str | None = setting(
        None, "auto: the check before serving spreads the base over all devices", value="auto", rare=True
    )
    prompts: int = setting(10, "how many prompts are sent to check it", at_least=1, rare=True, unit="prompts")
    other_base: bool = other_base_setting(rare=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExportSettings(TokenizerSettings):
    """Export"""

    adapter_path: str = setting(..., "the output folder of a run, or one of its checkpoints", value="FOLDER")
    output_dir: str = setting(..., "folder for what is written", value="FOLDER")
    to: ExportTarget = setting("gguf", "gguf: for llama.cpp and Ollama; peft: the adapter for another model class")
    quantize: GgufFormat = setting("bf16", "number format of the GGUF")
    for_class: str | None = setting(None, "with --to peft: the transformers class that is to load it", value="CLASS")
    no_certify: bool = setting(False, "do not start the engine to check that it serves the tuned model")
    prompts: int = setting(10, "how many prompts are sent to check it", at_least=1, rare=True, unit="prompts")
    other_base: bool = other_base_setting(rare=True)


def base_of_adapter(settings: CertifySettings | ExportSettings | MergeSettings) -> dict[str, Any]:
    """What model.base_as_trained.adapter_and_base needs to know of the base that the user chose."""
    return {
        "model_path": settings.model_path,
        "trust_remote_code": settings.trust_remote_code,
        "other_base": settings.other_base,
    }


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunsSettings:
    """Runs"""

    folder: list[str] = setting(["."], "a folder with runs in it; two or more runs are compared", value="FOLDER")
    plot: str | None = setting(
        None,
        "draw the losses of the compared runs, of training and of held-out records, into this file",
        value="FILE.png",
    )
    json: bool = setting(False, "print the result as JSON")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainOutput:
    """Output"""

    json: bool = setting(False, "print run.json on standard output when the run is done, and nothing else there")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanOutput:
    """Plan"""

    json: bool = setting(False, "print the figures as JSON")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepChoices:
    """Sweep"""

    try_: list[str] = setting(
        [],
        "values of a setting to try, for example learning_rate=1e-4,3e-4. With several of these, every combination is "
        "tried. With --trials also a range, for example learning_rate=1e-5:1e-3. Default: the learning rate that suits "
        "the base, a third of it and three times as much",
        value="NAME=A,B",
    )
    trials: int = setting(
        0,
        "run this many trials, each chosen from the results of the earlier ones, and stop those that are clearly "
        "behind; needs atomtune[sweep]; 0: every combination of --try once",
        at_least=0,
        unit="trials",
    )
    json: bool = setting(False, "print sweep.json on standard output, and nothing else there")
