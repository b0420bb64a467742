"""Sources of prompts and real images, one file per kind of source. `DATA` maps their names to their classes."""

from fastgen.data.base import DataError, DataSource, Stream, make_batch
from fastgen.data.digit_views import DigitViewsData
from fastgen.data.hub import HubData
from fastgen.data.images import ImageData
from fastgen.data.moving_digits import MovingDigitsData
from fastgen.data.order import shuffled
from fastgen.data.pictures import image_files
from fastgen.data.prompts import PromptData, read_prompts
from fastgen.data.samples import SampleSource
from fastgen.data.tar_shards import WebDatasetData
from fastgen.data.toys import AR1Data, DigitsData, MixtureData, exact_data
from fastgen.data.videos import VideoData
from fastgen.registry import DATA

__all__ = [
    "DATA",
    "AR1Data",
    "DataError",
    "DataSource",
    "DigitViewsData",
    "DigitsData",
    "HubData",
    "ImageData",
    "MixtureData",
    "MovingDigitsData",
    "PromptData",
    "SampleSource",
    "Stream",
    "VideoData",
    "WebDatasetData",
    "exact_data",
    "image_files",
    "make_batch",
    "read_prompts",
    "shuffled",
]
