package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/kubernetes/pkg/kubelet/cm/containermap"
	"k8s.io/kubernetes/pkg/kubelet/cm/devicemanager"
)

// containerLog is the container runtime that is played: a file with one line for each container that started or
// ended and for each pod that was refused. What has started and not ended runs, also while no kubelet does.
type containerLog struct {
	mutex   sync.Mutex
	file    *os.File
	running map[string]containerEvent // by container id
}

const (
	containerStarted = "started"
	containerEnded   = "ended"
	podRefused       = "refused"
)

type containerEvent struct {
	Time        string              `json:"time"`
	Event       string              `json:"event"`
	UID         string              `json:"uid"`
	Namespace   string              `json:"namespace"`
	Pod         string              `json:"pod"`
	Container   string              `json:"container,omitempty"`
	ID          string              `json:"id,omitempty"`
	Devices     map[string][]string `json:"devices,omitempty"`
	Envs        map[string]string   `json:"envs,omitempty"`
	CDIDevices  []string            `json:"cdi_devices,omitempty"`
	DeviceNodes []deviceNode        `json:"device_nodes,omitempty"`
	Mounts      []hostMount         `json:"mounts,omitempty"`
	Annotations map[string]string   `json:"annotations,omitempty"`
	Reason      string              `json:"reason,omitempty"`
	Message     string              `json:"message,omitempty"`
}

type deviceNode struct {
	Host        string `json:"host"`
	Container   string `json:"container"`
	Permissions string `json:"permissions"`
}

type hostMount struct {
	Host      string `json:"host"`
	Container string `json:"container"`
	ReadOnly  bool   `json:"read_only"`
}

func openContainerLog(directory string) (*containerLog, error) {
	path := filepath.Join(directory, "containers.jsonl")
	written, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	whole := written[:bytes.LastIndexByte(written, '\n')+1] // a line cut short by a kill never was
	running, err := replay(whole)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	return &containerLog{file: file, running: running}, file.Truncate(int64(len(whole)))
}

func replay(lines []byte) (map[string]containerEvent, error) {
	running := map[string]containerEvent{}
	for line := range bytes.Lines(lines) {
		var event containerEvent
		if err := json.Unmarshal(line, &event); err != nil {
			return nil, err
		}
		apply(running, event)
	}
	return running, nil
}

func apply(running map[string]containerEvent, event containerEvent) {
	switch event.Event {
	case containerStarted:
		running[event.ID] = event
	case containerEnded:
		delete(running, event.ID)
	}
}

// write appends the event and returns when the disk has it.
func (c *containerLog) write(event containerEvent) error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	event.Time = time.Now().UTC().Format(time.RFC3339Nano)
	line, err := json.Marshal(event)
	if err != nil {
		return err
	}
	if _, err := c.file.Write(append(line, '\n')); err != nil {
		return err
	}
	apply(c.running, event)
	return c.file.Sync()
}

// end writes that the container has ended, unless it had before.
func (c *containerLog) end(id, reason string) error {
	c.mutex.Lock()
	started, runs := c.running[id]
	c.mutex.Unlock()
	if !runs {
		return nil
	}
	return c.write(containerEvent{
		Event: containerEnded, UID: started.UID, Namespace: started.Namespace, Pod: started.Pod,
		Container: started.Container, ID: id, Devices: started.Devices, Reason: reason,
	})
}

// of is what runs of a pod.
func (c *containerLog) of(uid string) []containerEvent {
	var found []containerEvent
	for _, event := range c.all() {
		if event.UID == uid {
			found = append(found, event)
		}
	}
	return found
}

func (c *containerLog) all() []containerEvent {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	var found []containerEvent
	for _, event := range c.running {
		found = append(found, event)
	}
	return found
}

// known is what the device manager is told of at a start: the containers that there are, and which of them run.
func (c *containerLog) known() (containermap.ContainerMap, sets.Set[string]) {
	known, running := containermap.NewContainerMap(), sets.New[string]()
	for _, event := range c.all() {
		known.Add(event.UID, event.Container, event.ID)
		running.Insert(event.ID)
	}
	return known, running
}

// given fills in what the device manager has for the container.
func (event *containerEvent) given(
	devices devicemanager.ResourceDeviceInstances, options *devicemanager.DeviceRunContainerOptions,
) {
	event.Devices = map[string][]string{}
	for resource, instances := range devices {
		event.Devices[resource] = sets.List(sets.KeySet(instances))
	}
	if options == nil {
		return
	}
	event.Envs, event.Annotations = map[string]string{}, map[string]string{}
	for _, env := range options.Envs {
		event.Envs[env.Name] = env.Value
	}
	for _, annotation := range options.Annotations {
		event.Annotations[annotation.Name] = annotation.Value
	}
	for _, device := range options.CDIDevices {
		event.CDIDevices = append(event.CDIDevices, device.Name)
	}
	for _, node := range options.Devices {
		event.DeviceNodes = append(event.DeviceNodes, deviceNode{node.PathOnHost, node.PathInContainer, node.Permissions})
	}
	for _, mount := range options.Mounts {
		event.Mounts = append(event.Mounts, hostMount{mount.HostPath, mount.ContainerPath, mount.ReadOnly})
	}
}
