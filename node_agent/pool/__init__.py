"""Instances: started on demand and ahead of it, kept while that pays, ended when memory is short.

`pool` does it, `keepwarm` decides how long an idle one stays, `memory` says how much there is.
"""
