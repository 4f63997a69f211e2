;; A WASI preview 1 command for the tests. It reads a number and does what the first byte asks for.
(module
  (import "wasi_snapshot_preview1" "fd_read"
    (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write"
    (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (memory (export "memory") 2)
  (data (i32.const 1024) "tick\n")
  (data (i32.const 1040) "it went wrong\n")
  (data (i32.const 1064) "note.txt")
  (data (i32.const 1080) "grown\n")

  ;; Writes `size` bytes at `from`; the list of one buffer lies at 0, what was written at 8.
  (func $say (param $to i32) (param $from i32) (param $size i32)
    (i32.store (i32.const 0) (local.get $from))
    (i32.store (i32.const 4) (local.get $size))
    (drop (call $fd_write (local.get $to) (i32.const 0) (i32.const 1) (i32.const 8))))

  ;; Reads what there is, up to 1000 bytes, to 2048; returns how much.
  (func $hear (param $source i32) (result i32)
    (i32.store (i32.const 0) (i32.const 2048))
    (i32.store (i32.const 4) (i32.const 1000))
    (if (call $fd_read (local.get $source) (i32.const 0) (i32.const 1) (i32.const 8))
      (then (return (i32.const 0))))
    (i32.load (i32.const 8)))

  ;; Says everything that can be read.
  (func $copy (param $source i32)
    (local $size i32)
    (loop $more
      (local.set $size (call $hear (local.get $source)))
      (if (local.get $size)
        (then
          (call $say (i32.const 1) (i32.const 2048) (local.get $size))
          (br $more)))))

  ;; Opens note.txt of the first folder; ends with the error's number when there is none.
  (func $open (param $flags i32) (param $rights i64) (result i32)
    (local $error i32)
    (local.set $error
      (call $path_open (i32.const 3) (i32.const 0) (i32.const 1064) (i32.const 8)
        (local.get $flags) (local.get $rights) (i64.const 0) (i32.const 0) (i32.const 12)))
    (if (local.get $error) (then (call $proc_exit (local.get $error))))
    (i32.load (i32.const 12)))

  (func $deeper (param $depth i32) (result i32)
    (i32.add (local.get $depth) (call $deeper (i32.add (local.get $depth) (i32.const 1)))))

  (func (export "_start")
    (local $size i32) (local $asked i32)
    (local.set $size (call $hear (i32.const 0)))
    (local.set $asked (i32.load8_u (i32.const 2048)))

    (if (i32.eq (local.get $asked) (i32.const 0x30)) ;; 0: call itself without an end
      (then (drop (call $deeper (i32.const 0)))))
    (if (i32.eq (local.get $asked) (i32.const 0x32)) ;; 2: say something for ever
      (then (loop $tick (call $say (i32.const 1) (i32.const 1024) (i32.const 5)) (br $tick))))
    (if (i32.eq (local.get $asked) (i32.const 0x33)) ;; 3: fail
      (then
        (call $say (i32.const 2) (i32.const 1040) (i32.const 14))
        (call $proc_exit (i32.const 3))))
    (if (i32.eq (local.get $asked) (i32.const 0x34)) ;; 4: refuse the input
      (then (call $proc_exit (i32.const 65))))
    (if (i32.eq (local.get $asked) (i32.const 0x35)) ;; 5: never end, and say nothing
      (then (loop $spin (br $spin))))
    (if (i32.eq (local.get $asked) (i32.const 0x36)) ;; 6: take 64 MiB of memory
      (then
        (if (i32.eq (memory.grow (i32.const 1024)) (i32.const -1))
          (then (call $proc_exit (i32.const 9))))
        (call $say (i32.const 1) (i32.const 1080) (i32.const 6))
        (return)))
    (if (i32.eq (local.get $asked) (i32.const 0x37)) (then (unreachable))) ;; 7
    (if (i32.eq (local.get $asked) (i32.const 0x38)) ;; 8: read beyond the memory
      (then (drop (i32.load (i32.const 0x7fffffff)))))
    (if (i32.eq (local.get $asked) (i32.const 0x39)) ;; 9: read a file
      (then (call $copy (call $open (i32.const 0) (i64.const 2))) (return)))
    (if (i32.eq (local.get $asked) (i32.const 0x2d)) ;; a negative number: write a file
      (then (drop (call $open (i32.const 1) (i64.const 64))) (return)))

    (call $say (i32.const 1) (i32.const 2048) (local.get $size)) ;; anything else: say it again
    (call $copy (i32.const 0))))
