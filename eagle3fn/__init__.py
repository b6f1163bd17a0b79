"""EAGLE-3 draft training as pure functions on PyTorch.

The folders, in the order of the data flow:

- `base`: types, configuration, gradients, files, errors, which all others import
- `data`: a target and conversations, to feature files, to a `Batch`
- `model`: a `Batch` to a loss
- `train`: a loss to a `TrainState`, to a checkpoint
- `use`: trained parameters to an exported draft, to speculative decoding
"""

from eagle3fn.base.config import Config as Config
from eagle3fn.base.config import load_config as load_config
from eagle3fn.base.draft_config import DraftConfig as DraftConfig
from eagle3fn.base.draft_json import draft_config_from_json as draft_config_from_json
from eagle3fn.base.draft_keys import draft_config_from_target as draft_config_from_target
from eagle3fn.base.errors import UserError as UserError
from eagle3fn.base.grad import value_and_grad as value_and_grad
from eagle3fn.base.launch import ranks as ranks
from eagle3fn.base.sections import DataConfig as DataConfig
from eagle3fn.base.sections import ObjectiveConfig as ObjectiveConfig
from eagle3fn.base.sections import OptimizerConfig as OptimizerConfig
from eagle3fn.base.sections import TrainConfig as TrainConfig
from eagle3fn.base.types import Aux as Aux
from eagle3fn.base.types import Batch as Batch
from eagle3fn.base.types import Frozen as Frozen
from eagle3fn.base.types import Sample as Sample
from eagle3fn.base.types import TrainState as TrainState
from eagle3fn.base.types import VocabMap as VocabMap
from eagle3fn.data import stages as stages
from eagle3fn.data.collate import align as align
from eagle3fn.data.collate import align_mask as align_mask
from eagle3fn.data.collate import collate as collate
from eagle3fn.data.collate import collate_packed as collate_packed
from eagle3fn.data.features import FeatureSet as FeatureSet
from eagle3fn.data.features import open_features as open_features
from eagle3fn.data.features import read_sample as read_sample
from eagle3fn.data.open_encoder import Encoder as Encoder
from eagle3fn.data.open_encoder import open_encoder as open_encoder
from eagle3fn.data.pipeline import batches as batches
from eagle3fn.data.pipeline import split as split
from eagle3fn.data.samples import Encoded as Encoded
from eagle3fn.data.target_source import target_config as target_config
from eagle3fn.data.target_tensors import make_frozen as make_frozen
from eagle3fn.data.target_tensors import read_target_tensors as read_target_tensors
from eagle3fn.data.vocab import load_map as load_map
from eagle3fn.model.forward import forward_loss as forward_loss
from eagle3fn.model.losses import LOSSES as LOSSES
from eagle3fn.model.losses import RowLoss as RowLoss
from eagle3fn.model.table import init_params as init_params
from eagle3fn.model.table import start_from_target as start_from_target
from eagle3fn.train.bind import Functions as Functions
from eagle3fn.train.bind import bind as bind
from eagle3fn.train.optimizer import OPTIMIZERS as OPTIMIZERS
from eagle3fn.train.optimizer import Optimizer as Optimizer
from eagle3fn.train.optimizer import UpdateInfo as UpdateInfo
from eagle3fn.train.schedules import SCHEDULES as SCHEDULES
from eagle3fn.train.shard import LeafSpec as LeafSpec
from eagle3fn.train.shard import gather as gather
from eagle3fn.train.shard import state_specs as state_specs
from eagle3fn.train.step import init_state as init_state
from eagle3fn.train.step import step as step
from eagle3fn.use.export import Draft as Draft
from eagle3fn.use.export import export as export
from eagle3fn.use.export import load_draft as load_draft

__version__ = "0.1.0"
