"""Lua that the scripts of several modules share."""

from __future__ import annotations

from typing import Final

DROP_UNLESS: Final = """
local function drop_unless(kind, key)
  local found = redis.call('TYPE', key).ok
  if found ~= 'none' and found ~= kind then redis.call('UNLINK', key) end
end
"""
"""Defines `drop_unless(kind, key)`, which deletes a key of another type than `kind`.

No proxy has written such a key, and each command on it would fail.
"""
