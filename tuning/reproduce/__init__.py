"""Tries a published claim: trains its arms with several seeds and judges its statements by rules fixed beforehand.

A claim is a file of `tuning/claims/`. Its folder holds claim.json (the file's SHA-256, written before the first run),
ARM-s1, ARM-s2, ... (runs like any other), ARM-seeds (their groups) and, after each run, result.json.
"""
