"""Spoken-language sets: sWUGGY, sBLIMP, tStoryCloze, sStoryCloze (`python -m eval.zerospeech`)."""
