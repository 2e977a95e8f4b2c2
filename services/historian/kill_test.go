package historian

const childMarker = "TOLLKEEPER_TEST_HISTORIAN"

func runChild() int { return 1 }
