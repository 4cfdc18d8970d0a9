"""Imported by the process that commands are forked from: loads what a command loads late, once for all of them."""

from rlvr_landscape_plugin.config import EnvConfig
from rlvr_landscape_plugin.episodes import check_chat, open_tasks
from rlvr_landscape_plugin.snapshot import SHIPPED, open_snapshot
from rlvr_landscape_plugin.snapshot.architecture import check_architecture

check_chat([SHIPPED["tiny-sorter"]], open_tasks(EnvConfig(id="tiny-quiz", num_prompts=1, rollouts=1)).tasks)
check_architecture(open_snapshot("tiny-sorter"))
