"""The registry's memory: the current catalogue and its history in SQLite."""

from registry.store.sqlite import Change, HistoryEntry, SqliteStore, StoredCapability

__all__ = ["Change", "HistoryEntry", "SqliteStore", "StoredCapability"]
