"""Weight files of all known kinds, and the training state that a resumed run needs."""

from libs.checkpoints.files import about, file_of, read_weights, settled, write_weights
from libs.checkpoints.infer import ASSUMED, infer
from libs.checkpoints.layouts import LAYOUTS, complete, export, kind, to_ours
from libs.checkpoints.load import check_config, check_fit, flags, known, load_weights
