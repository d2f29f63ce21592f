"""From a table of videos to micro-batches: records -> bucket -> plan, sampler -> loader -> batch.

Importing `opensora.data.loader` registers the data set.
"""
