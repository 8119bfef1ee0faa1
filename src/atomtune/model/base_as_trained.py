"""Base as trained: an adapter answers on the weights it was trained on, which may have been quantized."""

from collections.abc import Callable, Sequence
from pathlib import Path

from atomtune.choices import Dtype, Quantize
from atomtune.data.encoding.chat_template import Template
from atomtune.errors import BadSettings
from atomtune.extras import refuse_missing_packages
from atomtune.model.adapter import refuse_damaged
from atomtune.model.adapter_folder import AdapterMetadata, base_of, template_of
from atomtune.model.fingerprint import refuse_other_base
from atomtune.model.load import BaseSpec, device_in_use, is_stored_quantized, resolve_dtype


def adapter_and_base(
    folder: Path,
    *,
    model_path: str | None,
    trust_remote_code: bool,
    other_base: bool,
    notice: Callable[[str], None],
    is_computed: bool = True,
) -> tuple[Template, AdapterMetadata, str]:
    """(template, metadata, path of the base) of a saved adapter; no base is loaded.

    A base that is not on this machine yet cannot be compared before it is loaded: see fingerprint.is_at_hand.
    Raises BadModel for a folder without an adapter, a damaged adapter, or a base that it was not trained on.
    """
    refuse_damaged(folder, is_computed=is_computed)
    template, metadata = template_of(folder, model_path=model_path, trust_remote_code=trust_remote_code, notice=notice)
    base_path = base_of(folder, model_path)
    refuse_other_base(base_path, metadata.base, anyway=other_base, notice=notice)
    return template, metadata, base_path


def base_spec(
    trained: Sequence[AdapterMetadata],
    *,
    path: str,
    dtype: Dtype,
    quantize: Quantize | None,
    device_map: str | None,
    trust_remote_code: bool,
    notice: Callable[[str], None],
) -> BaseSpec:
    """The base on the device in use, in the dtype of training if it is quantized as in training.

    trained  metadata of each adapter that is to be used on it; if their dtypes differ, `dtype` is used
    dtype    --dtype
    """
    formats = {_dtype_as_trained(metadata, quantize=quantize, requested=dtype) for metadata in trained}
    requested = formats.pop() if len(formats) == 1 else dtype
    device = device_in_use()
    return BaseSpec(
        path=path,
        dtype=resolve_dtype(requested, device, notice=notice),
        device=device,
        device_map=device_map,
        quantize=quantize,
        trust_remote_code=trust_remote_code,
    )


def quantize_as_trained(
    base_path: str,
    trained: Sequence[Quantize | None],
    *,
    requested: Quantize | None,
    stored: bool,
    trust_remote_code: bool,
    notice: Callable[[str], None],
) -> Quantize | None:
    """How to quantize the base: by --quantize, else as in the training of its adapters.

    trained    the quantization of each adapter's training; if they differ, the base is used as it is stored
    requested  --quantize
    stored     --stored_base
    Raises BadSettings if bitsandbytes is missing, or if both flags are given.
    """
    if requested and stored:
        raise BadSettings([f"--quantize {requested} and --stored_base contradict each other: pass one of them."])
    quantized = [kind for kind in dict.fromkeys(trained) if kind]
    if requested or not quantized or is_stored_quantized(base_path, trust_remote_code=trust_remote_code):
        return requested
    if stored or len(set(trained)) > 1:
        why = "--stored_base" if stored else "not all adapters were trained that way"
        notice(
            f"the base was held in {' and '.join(quantized)} in training, but is used as it is stored here ({why}): it "
            "does not answer quite as it was trained to."
        )
        return None
    (kind,) = quantized
    refuse_missing_packages(
        ["bitsandbytes"], extra="qlora", what=f"The base in {kind}, as in training,", otherwise="--stored_base"
    )
    notice(f"the base is held in {kind}, as it was in training; --stored_base uses its weights as they are stored.")
    return kind


def _dtype_as_trained(trained: AdapterMetadata, *, quantize: Quantize | None, requested: Dtype) -> Dtype:
    """The dtype of the base: --dtype, else that of training if the base is quantized as in training.

    Quantizing from another dtype rounds some weights to another step: with float16 in place of bfloat16 the answers
    differed 10,000 times as much from those in training.
    quantize   how the base is quantized now
    requested  --dtype
    """
    if requested == "auto" and quantize and quantize == trained.quantize:
        return trained.dtype
    return requested
