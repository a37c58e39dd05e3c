from utils.files import *  # noqa
from utils.files import UserError, sentence, counted, listed, out_of_memory, reports_errors  # noqa


def quiet_decoders():
    pass
