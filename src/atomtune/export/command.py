"""Export: an adapter in the form that another program needs, and the check that the program serves the tuned model."""

import shlex
from pathlib import Path

from atomtune.certify.command import certify_served, refuse_failed, trained_side, write_certificate
from atomtune.console import Console, as_command
from atomtune.data.encoding.chat_template import Template
from atomtune.errors import BadSettings, Stopped
from atomtune.export.gguf import (
    adds_bos,
    convert,
    copy_sentencepiece,
    refuse_unknown_architecture,
    refuse_without_converter,
    say_where_a_space_goes,
)
from atomtune.export.merge import write_merged
from atomtune.export.ollama import model_name, modelfile, ollama_template
from atomtune.export.output_folder import filling
from atomtune.export.peft_keys import rewrite_keys
from atomtune.folders import is_free, scratch_folder
from atomtune.language import translated
from atomtune.model.adapter_folder import WEIGHTS, base_of, template_of
from atomtune.model.base_as_trained import adapter_and_base
from atomtune.model.fingerprint import say_unchecked
from atomtune.model.load import quiet_libraries
from atomtune.settings.command_settings import CertifySettings, ExportSettings, MergeSettings, base_of_adapter
from atomtune.settings.spelled import base_words, words_of


def export(settings: ExportSettings) -> int:
    """Run `atomtune export`. Raises CheckFailed (exit code 4) if the engine does not serve the tuned model."""
    _refuse_impossible(settings)
    quiet_libraries()
    console = Console()
    if settings.to == "peft":
        _to_peft(settings, console)
    else:
        _to_gguf(settings, console)
    return 0


def _refuse_impossible(settings: ExportSettings) -> None:
    out = Path(settings.output_dir)
    problems: list[str] = []
    if not is_free(out):
        problems.append(f"--output_dir {out} is not an empty folder. Pass a new one.")
    if settings.to == "peft" and not settings.for_class:
        problems.append("--to peft needs --for_class, for example --for_class Gemma3ForConditionalGeneration.")
    if settings.to == "peft" and (of_gguf := words_of(settings, also=("quantize", "no_certify", "prompts"))):
        problems.append(f"--to peft writes no GGUF and asks no engine, so leave out {' '.join(of_gguf)}.")
    if settings.to != "peft" and settings.for_class:
        problems.append("--for_class is used with --to peft only.")
    if problems:
        raise BadSettings(problems)


def _to_peft(settings: ExportSettings, console: Console) -> None:
    adapter, out, class_name = Path(settings.adapter_path), Path(settings.output_dir), str(settings.for_class)
    # The copy is for PEFT, which computes kinds of adapters that are refused here.
    _, metadata, base_path = adapter_and_base(
        adapter, **base_of_adapter(settings), notice=console.notice, is_computed=False
    )
    say_unchecked(base_path, metadata.base, notice=console.notice)
    trust = settings.trust_remote_code
    with filling(out, last=WEIGHTS) as folder:
        renamed = rewrite_keys(adapter, folder, class_name, base_path, trust_remote_code=trust)
    console.say(f"{out}: the adapter for {class_name}; {renamed:,} of its tensors are renamed.")


def _to_gguf(settings: ExportSettings, console: Console) -> None:
    adapter, out = Path(settings.adapter_path), Path(settings.output_dir)
    refuse_without_converter()
    base_path = base_of(adapter, settings.model_path)
    refuse_unknown_architecture(base_path, trust_remote_code=settings.trust_remote_code)
    name = adapter.resolve().name
    file = out / f"{name}-{settings.quantize}.gguf"
    with filling(out, last=file.name) as folder, scratch_folder("scratch-", within=folder) as scratch:
        merged = scratch / name  # the converter names the model after its folder
        write_merged(_merge_settings(settings), merged, console, unrounded=("--quantize", "f32"))
        copy_sentencepiece(base_path, merged)
        template, metadata = template_of(
            adapter, model_path=settings.model_path, trust_remote_code=settings.trust_remote_code
        )
        say_where_a_space_goes(merged, template.tokenizer)
        console.say(f"converting to {file.name} …")
        convert(merged, folder / file.name, settings.quantize)
    has_modelfile = _write_modelfile(file, template, metadata.instruction, console)
    if settings.no_certify:
        console.notice("--no_certify: whether llama.cpp serves the tuned model from this file has not been checked.")
    else:
        try:
            _certify(settings, file, console)
        except KeyboardInterrupt:
            raise Stopped(_left_uncertified(settings, file)) from None
    console.say(translated(f"{file.name} is in {out}."))
    console.next_steps(_next_commands(settings, file, name if has_modelfile else None))


def _left_uncertified(settings: ExportSettings, file: Path) -> str:
    """What to do after a stop during the certificate: the file is complete, so `export` would refuse --output_dir."""
    adapter = ["--adapter_path", settings.adapter_path, *base_words(settings)]
    return (
        f"stopped: {file} is complete, but whether llama.cpp serves the tuned model from it has not been checked. To "
        f"check it:\n  {as_command(['certify', *adapter, '--served', str(file)])}"
    )


def _next_commands(settings: ExportSettings, file: Path, ollama_name: str | None) -> list[str]:
    """Commands to serve the GGUF here and, if there is a Modelfile, in Ollama under a name like this."""
    adapter = ["--adapter_path", settings.adapter_path, *base_words(settings)]
    commands = [as_command(["serve", *adapter, "--served", str(file)])]
    if ollama_name is not None:
        name, recipe = model_name(ollama_name), shlex.quote(str(file.parent / "Modelfile"))
        commands.append(f"ollama create {name} -f {recipe}")
        if settings.quantize != "q8_0":  # Ollama quantizes only what is not quantized yet
            uncertified = translated("smaller; no certificate covers it")
            commands.append(f"ollama create {name}-q4 --quantize q4_K_M -f {recipe}    # {uncertified}")
    return commands


def _merge_settings(settings: ExportSettings) -> MergeSettings:
    """An f32 file is made of a merge in float32: one that was rounded to bfloat16 would not pass as float32."""
    return MergeSettings(
        adapter_path=settings.adapter_path,
        model_path=settings.model_path,
        output_dir=settings.output_dir,
        dtype="float32" if settings.quantize == "f32" else "auto",
        other_base=settings.other_base,
        trust_remote_code=settings.trust_remote_code,
    )


def _certify(settings: ExportSettings, file: Path, console: Console) -> None:
    """Start llama.cpp with the file and write the certificate next to it. Raises CheckFailed if a check fails."""
    certify_settings = CertifySettings(
        adapter_path=settings.adapter_path,
        served=str(file),
        model_path=settings.model_path,
        prompts=settings.prompts,
        other_base=settings.other_base,
        trust_remote_code=settings.trust_remote_code,
    )
    side = trained_side(certify_settings, console)
    outcome = certify_served(side, file, "llama.cpp", certify_settings, console)
    write_certificate(outcome, file)
    refuse_failed([(file, outcome)])


def _write_modelfile(file: Path, template: Template, instruction: str | None, console: Console) -> bool:
    """Write a Modelfile next to the GGUF, or a notice why there is none; return whether it was written.

    instruction  that the training records share
    """
    for_ollama = ollama_template(template, adds_bos=adds_bos(file))
    if for_ollama is None:
        console.notice(
            f"no Modelfile: Ollama's template language cannot write the template {template.name} as training did. "
            "llama.cpp uses the template inside the GGUF and needs no Modelfile."
        )
        return False
    # A template without a system role puts the shared instruction at the beginning of the user's text.
    system = instruction if template.instruction_role == "system" else None
    if instruction and system is None:
        console.notice("the training records share an instruction: start the first message in Ollama with it.")
    try:
        text = modelfile(file, for_ollama, stops=template.stops or (template.stop,), system=system)
    except ValueError as error:
        console.notice(f"no Modelfile: {error}.")
        return False
    (file.parent / "Modelfile").write_text(text, encoding="utf-8")
    return True
