"""From files of records to token ids and labels. The order of the journey:

    read.py            files -> rows, each with its file and line
    formats.py         rows -> examples (conversation, text or preference), whatever the source's format
    split.py           examples -> training and evaluation sides; a row never changes side when others are added
    chat_templates.py  named chat templates, and the older data-set helpers of this field
    template.py        examples -> input_ids and labels; the one place that renders templates and masks prompts
    pack.py            short documents -> full rows, boundaries kept

`faults.py` gathers what is wrong with the data, so that all of it is shown at once.
"""
