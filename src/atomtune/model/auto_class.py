"""Auto class: which of transformers' Auto classes loads a checkpoint.

A vision-language checkpoint may have two classes for text: the whole class, which its config names, and the text part
alone (AutoModelForCausalLM gives that one for Qwen3.5). The whole class is loaded, so that an adapter's names fit the
class that servers build, and a merged model keeps its vision tower.
"""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

#: The Auto classes and their mappings from config to model class, the simplest first.
_KNOWN: dict[Any, Any] = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForMultimodalLM: MODEL_FOR_MULTIMODAL_LM_MAPPING,
}


def classes_for(config: Any) -> list[Any]:
    """The model classes that the Auto classes give for a config; empty if there is none."""
    return [class_ for auto in _KNOWN for class_ in _classes_of(auto, config)]


def auto_class(config: Any) -> Any:
    """The Auto class that gives the class in the config's `architectures`, else the first one that knows the config."""
    named = set(getattr(config, "architectures", None) or ())
    autos = _autos_for(config)
    for auto in autos:
        if named & {class_.__name__ for class_ in _classes_of(auto, config)}:
            return auto
    return autos[0] if autos else AutoModelForCausalLM


def is_known(config: Any) -> bool:
    """Whether transformers, or code that comes with the model, has a generative class for this config."""
    return bool(_autos_for(config))


def _autos_for(config: Any) -> list[Any]:
    """The Auto classes that have a class for a config, then those that the auto_map of its own code names."""
    own_code = getattr(config, "auto_map", None) or {}
    autos = [auto for auto in _KNOWN if _classes_of(auto, config)]
    return autos + [auto for auto in _KNOWN if auto.__name__ in own_code]


def _classes_of(auto: Any, config: Any) -> tuple[Any, ...]:
    """The model classes that an Auto class has for a config: none, one, or several."""
    if type(config) not in _KNOWN[auto]:
        return ()
    classes = _KNOWN[auto][type(config)]
    return classes if isinstance(classes, tuple) else (classes,)
