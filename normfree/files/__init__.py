"""Files that this package reads and writes: whole or not there, checked by what they say of themselves."""
