"""Static profiler: compiles for a TPU that is not there, and estimates the time of what comes out."""
