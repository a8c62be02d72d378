"""What is used around the method. The five modules work without this folder.

demo          the synthetic corpus in IEMOCAP's layout, and small encoders with random weights
variants      Context, and the released code's differences in stage 2
report        scores, intervals, tables, figures
check         --check: is a copy of a corpus complete, and what will a run need?
experiments   a sweep of alpha and beta; the differences one at a time
predict       emotions of your own conversation, by a finished run
tour          one conversation of a run through Eq. 1 to 25
pickles       a converter from the field's feature pickles to a feature file
"""
