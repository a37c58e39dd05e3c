"""Skeleton: to be rewritten by the pictures room."""

from utils.formats import *  # noqa
from utils.formats import Picture, read_picture, write_picture, QUALITY, KEEPABLE, in_png, to_grey, channels_of, from_channels, to_channels, KEPT_MODES  # noqa
from utils.images import find_pictures, is_picture, pictures_in, holds_pictures, read_image, eight_bits, write_png, reflect_pad, contact_sheet, peak_value  # noqa
