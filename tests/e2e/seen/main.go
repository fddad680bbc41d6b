// seen is the only program in the tests' containers: it prints as JSON what a program sees there.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

type device struct {
	Number string `json:"number"`
	Opens  string `json:"opens"`
}

type seen struct {
	Env     []string          `json:"env"`
	Devices map[string]device `json:"devices"`
	Files   map[string]string `json:"files"`
}

// main takes glob patterns: devices that match are opened for reading and writing, files are read.
func main() {
	answer := seen{Env: os.Environ(), Devices: map[string]device{}, Files: map[string]string{}}
	for _, pattern := range os.Args[1:] {
		paths, _ := filepath.Glob(pattern)
		for _, path := range paths {
			answer.look(path)
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(answer); err != nil {
		os.Exit(1)
	}
}

func (s *seen) look(path string) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		s.Files[path] = err.Error()
	case info.Mode()&os.ModeCharDevice != 0:
		s.Devices[path] = device{Number: number(info), Opens: opens(path)}
	case info.Mode().IsRegular():
		content, err := os.ReadFile(path)
		if err != nil {
			content = []byte(err.Error())
		}
		s.Files[path] = string(content)
	}
}

func number(info os.FileInfo) string {
	at := uint64(info.Sys().(*syscall.Stat_t).Rdev)
	return fmt.Sprintf("%d:%d", at>>8&0xfff, at&0xff)
}

// opens tells a cgroup's refusal (EPERM) from a device that is allowed and has no driver here (ENXIO).
func opens(path string) string {
	descriptor, err := syscall.Open(path, syscall.O_RDWR|syscall.O_NONBLOCK, 0)
	switch {
	case err == nil:
		_ = syscall.Close(descriptor)
		return "yes"
	case errors.Is(err, syscall.ENXIO), errors.Is(err, syscall.ENODEV):
		return "allowed, no driver"
	default:
		return err.Error()
	}
}
