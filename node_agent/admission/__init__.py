"""Who is taken in, when it is its turn, and what is dropped unstarted.

`control` joins the pure parts: `queue` (order and places), `forecast` (run times), `concurrency`
(how many at a time are worth it), `peers` (neighbours with room). `local` lets what runs here call
the node's own functions by the same rules; `calls` refuses those that would wait for each other.
"""
