"""Personal and controlled data in texts: what it is, where it stands, what takes its place.

    entities.py     the classes
    find.py         texts of a row -> spans
    regions.py      whose national phone numbers are read
    policy.py       which class is treated how; policies/ holds the built-in ones
    redactor.py     a row of texts -> the row without the values; `Redactor` is what the data steps call
    replace.py      the modes; pseudonyms.py makes substitutes, marks.py what a vault finds them by
    vault.py        originals, encrypted, and the way back
    keys.py         the secret behind pseudonyms and vault

Nothing here writes a value to a log, an error or a disk, the encrypted vault aside.
"""
