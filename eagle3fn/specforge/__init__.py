"""SpecForge's training as values: its recipe, its arithmetic, and readers of its files.

A recipe is a configuration and the functions that take the place of this package's own:

>>> import eagle3fn as e3
>>> from eagle3fn import specforge
>>> from eagle3fn.testing import Case, tiny_batch, tiny_frozen
>>> case = Case()
>>> config, recipe = specforge.recipe(
...     case.draft(),
...     objective={"ttt_length": case.steps},
...     train={"steps": 3, "dtype": "float32"},
... )
>>> functions = e3.bind(config, tiny_frozen(case), recipe=recipe)
>>> state = functions.init_state(functions.init(config.train.seed))
>>> for index in range(3):
...     state, metrics = functions.step(state, tiny_batch(case, index))
>>> int(state.step), metrics["skipped"]
(3, 0)

The same recipe goes to `train` as `recipe=recipe`, and its parts to `collate` and `batches` as
`align_mask=recipe.align_mask` and `order=recipe.order`. SpecForge's files are read by
`open_features` with `reader=READER` and by `load_map` with `read=read_map`.

- `recipes`: the recipe, its settings and functions; old settings refused
- `arithmetic`, `kl_kernel`: SpecForge's loss; on CUDA with a Triton kernel
- `feature_files`: readers of its features and vocabulary maps
- `script`: training by the arguments of its `train_eagle3.py`
- `compare_runs`: two runs' metrics, by exact value
- `oracle`, `cases`, `parity`, `bisect`: SpecForge itself, run next to ours and compared bit for bit
"""

from eagle3fn.specforge.arithmetic import forward_loss as forward_loss
from eagle3fn.specforge.feature_files import READER as READER
from eagle3fn.specforge.feature_files import read_map as read_map
from eagle3fn.specforge.recipes import DATAFLOW_RECIPE as DATAFLOW_RECIPE
from eagle3fn.specforge.recipes import RECIPE as RECIPE
from eagle3fn.specforge.recipes import RECIPES as RECIPES
from eagle3fn.specforge.recipes import SETTINGS as SETTINGS
from eagle3fn.specforge.recipes import SpecForge as SpecForge
from eagle3fn.specforge.recipes import align_mask as align_mask
from eagle3fn.specforge.recipes import recipe as recipe
from eagle3fn.specforge.recipes import schedule as schedule
from eagle3fn.specforge.recipes import script_order as script_order
from eagle3fn.specforge.recipes import start as start
from eagle3fn.specforge.recipes import stored_order as stored_order
