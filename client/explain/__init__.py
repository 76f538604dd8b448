"""Why a model answers as it does for one record; computed in the hospital, sent nowhere."""
