"""Source names: what the files and data sets of a run are called in the origins of their records."""

from atomtune.data.reading.sources import distinct_names
from atomtune.settings.train_settings import TrainSettings


def source_names(settings: TrainSettings) -> dict[str, str]:
    """Each source → its name in origins: enough of its path to tell files with the same name apart."""
    sources = settings.data.sources
    return dict(zip(sources, distinct_names(sources), strict=True))
