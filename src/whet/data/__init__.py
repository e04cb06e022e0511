"""From private records to token ids and labels. The order of the journey:

    read/              files, folders, databases and data sets -> rows, each with its place
    formats.py         rows -> examples (conversation, text or preference), whatever the source's format
    examples.py        what an example is; messages.py checks what it says, json_text.py reads values inside JSON
    clean.py           damaged and invisible characters, white space, HTML
    redact/            personal data: what is found, and what becomes of it
    similar/           duplicates, and training rows that hold evaluation text
    split.py           training and evaluation sides; a row never changes side when others are added
    prep/              all of that, for any number of rows -> a version of a data set
    report/            a version's data card, rows as the model sees them
    doctor/            what is wrong with a ready-made set

    chat_formats.py    named chat formats; chat_templates.py puts one on a tokenizer, and holds older data-set helpers
    template.py        examples -> input_ids and labels; the one place that renders templates
    labels.py          character spans -> labels; markers.py finds the spans by marker texts
    fingerprint.py     what a tokenizer makes of a conversation, as a digest that adapter and exports carry
    pack.py            short documents -> full rows, boundaries kept
    prepare.py         a version's examples -> what a trainer takes

`faults.py` gathers what is wrong with the data, so that all of it is shown at once.
"""
