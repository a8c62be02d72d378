"""What is used around the method; the five modules work without this folder.

demo: the synthetic corpus and small random encoders. variants: Context, and the released code's differences. report:
scores, intervals, tables, figures. check: `--check`. experiments: sweep and presets. predict: your own conversation.
tour: a conversation through Eq. 1 to 25. pickles: a converter from the field's pickles to a feature file.
"""
