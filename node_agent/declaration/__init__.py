"""What a node offers, as people write it: read, looked over, and followed while it changes.

`reader` reads a TOML node file, a Python file or a module, all mistakes at once (`problem`): its
tables are laid over what the code says (`layers`), sizes and times may carry units (`quantities`).
User code is imported by a child (`introspection`). `inspection` looks a declaration over (``foam
node check``); `watch` follows its files (`sources`).
"""

from node_agent.declaration.reader import Declaration, load_declaration, read_declaration

__all__ = ["Declaration", "load_declaration", "read_declaration"]
