# A program for the tests: it reads one JSON document and does what the document asks for.
read -r asked
case "$asked" in
  *endless*) while :; do echo tick; sleep 0.01; done ;;
  *fail*) echo first >&2; echo "it went wrong" >&2; exit 3 ;;
  *refuse*) echo "no such pump" >&2; exit 65 ;;
  *) echo one; echo two; printf %s "$asked" ;;
esac
