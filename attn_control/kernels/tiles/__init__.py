"""``impl="torch"``: large query tiles over the keys that a mask keeps, one worker a core."""
