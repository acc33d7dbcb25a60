"""Pure mathematics: arrays and numbers in, arrays out."""
