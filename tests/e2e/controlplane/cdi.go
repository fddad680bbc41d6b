package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	oci "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/spf13/cobra"
	"tags.cncf.io/container-device-interface/pkg/cdi"
)

// newCDICommand is around the library with which container runtimes read CDI specs.
func newCDICommand() *cobra.Command {
	command := &cobra.Command{Use: "cdi", SilenceUsage: true}
	command.AddCommand(newCDIValidateCommand(), newCDIInjectCommand())
	return command
}

func newCDIValidateCommand() *cobra.Command {
	var directory string
	command := &cobra.Command{
		Use:   "validate",
		Short: "check every spec file and print the devices' full names as JSON",
		RunE: func(*cobra.Command, []string) error {
			devices, err := devicesOf(directory)
			if err != nil {
				return err
			}
			return json.NewEncoder(os.Stdout).Encode(devices)
		},
	}
	command.Flags().StringVar(&directory, "dir", "", "directory with spec files")
	_ = command.MarkFlagRequired("dir")
	return command
}

func newCDIInjectCommand() *cobra.Command {
	var directory string
	var devices []string
	command := &cobra.Command{
		Use:   "inject",
		Short: "read an OCI config.json, apply the devices' edits, print it",
		RunE: func(*cobra.Command, []string) error {
			var config oci.Spec
			if err := json.NewDecoder(os.Stdin).Decode(&config); err != nil {
				return fmt.Errorf("standard input is no OCI config: %w", err)
			}
			if err := inject(directory, devices, &config); err != nil {
				return err
			}
			return json.NewEncoder(os.Stdout).Encode(config)
		},
	}
	command.Flags().StringVar(&directory, "dir", "", "directory with spec files")
	command.Flags().StringArrayVar(&devices, "device", nil, "full name of a device; may be repeated")
	_ = command.MarkFlagRequired("dir")
	_ = command.MarkFlagRequired("device")
	return command
}

// devicesOf reads every file in the directory: one that a runtime would pass over because of its name is refused.
func devicesOf(directory string) ([]string, error) {
	files, err := os.ReadDir(directory)
	if err != nil {
		return nil, err
	}
	names := []string{}
	for _, file := range files {
		path := filepath.Join(directory, file.Name())
		if extension := filepath.Ext(path); extension != ".json" && extension != ".yaml" {
			return nil, fmt.Errorf("%s: runtimes read .json and .yaml files only", path)
		}
		spec, err := cdi.ReadSpec(path, 0)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if spec == nil {
			return nil, fmt.Errorf("%s: it vanished", path)
		}
		for _, device := range spec.Devices {
			names = append(names, spec.Kind+"="+device.Name)
		}
	}
	slices.Sort(names)
	if repeated := firstRepeated(names); repeated != "" {
		return nil, fmt.Errorf("%s: in %s more than once, so no runtime would inject it", repeated, directory)
	}
	return names, nil
}

func firstRepeated(sorted []string) string {
	for index := 1; index < len(sorted); index++ {
		if sorted[index] == sorted[index-1] {
			return sorted[index]
		}
	}
	return ""
}

func inject(directory string, devices []string, config *oci.Spec) error {
	registry, err := cdi.NewCache(cdi.WithSpecDirs(directory), cdi.WithAutoRefresh(false))
	if err != nil {
		return err
	}
	missing, err := registry.InjectDevices(config, devices...)
	if err != nil {
		return fmt.Errorf("%w; missing: %v; files: %v", err, missing, registry.GetErrors())
	}
	return nil
}
