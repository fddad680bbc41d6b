// The JSON schema of the Container Device Interface, for the files named on the command line. A module of its own:
// the last release that carries the schema does not compile beside the OCI types that Kubernetes pins.
package main

import (
	"fmt"
	"os"

	"tags.cncf.io/container-device-interface/schema"
)

func main() {
	wrong := len(os.Args) < 2
	for _, path := range os.Args[1:] {
		if err := schema.BuiltinSchema().ValidateFile(path); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", path, err)
			wrong = true
		}
	}
	if wrong {
		os.Exit(1)
	}
}
