"""Memories that outlive a conversation, each under a person's name."""

from moshi_ttt.kept.folder import Kept, KeptMemory
from moshi_ttt.kept.keeper import Keeper
from moshi_ttt.kept.names import check_name
from moshi_ttt.kept.person import Person

__all__ = ["Keeper", "Kept", "KeptMemory", "Person", "check_name"]
